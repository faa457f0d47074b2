"""Where the values of a compiled function lie: planned once, while compiling."""

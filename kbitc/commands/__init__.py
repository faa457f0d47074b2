"""One file a command: what it does, as a function that returns plain data; `show` prints it."""

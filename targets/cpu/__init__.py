"""What the CPU targets (x86 and NEON) share."""

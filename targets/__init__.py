"""Everything that knows a machine: the only code that imports tvm."""

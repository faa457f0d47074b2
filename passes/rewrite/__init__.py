"""Stage 7: carries the plan out on the graph. Nothing here decides."""

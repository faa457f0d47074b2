"""Stage 5: decides which weight gets which scheme. One file an allocator; `survey.py` finds the candidates."""

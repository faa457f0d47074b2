"""One file a data type. Each defines ``make(bits) -> Format``; ``kbitc.catalog`` finds it by file name."""

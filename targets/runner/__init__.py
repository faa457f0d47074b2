"""kbitc-run: the native runner that an edge user ships beside a bundle, and how it is built."""

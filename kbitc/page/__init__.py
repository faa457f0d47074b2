"""The page that `kbitc analyze` writes: one HTML file without any request to the outside."""

"""Stage 3: what the values of a model look like when it runs on sample inputs."""

"""Convolutions that add the weight rows of active inputs."""

"""Experiments: what the layers achieve, each by one command."""

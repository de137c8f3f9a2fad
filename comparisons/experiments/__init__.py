"""End-to-end experiments: a whole model trained once per backend."""

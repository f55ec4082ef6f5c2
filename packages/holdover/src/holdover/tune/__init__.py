"""Which method suits a model and its loop, and what it costs."""

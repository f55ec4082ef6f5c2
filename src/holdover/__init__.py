"""Holdover makes video world models fast without training them."""

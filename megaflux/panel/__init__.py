"""A local web page to generate with."""

"""Sources of pictures and the writing of prepared datasets."""

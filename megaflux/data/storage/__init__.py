"""Prepared datasets on disk and on remote storage."""

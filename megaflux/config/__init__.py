"""The configuration: schema, presets, parsing."""

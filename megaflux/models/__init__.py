"""The networks: Qwen2-VL, connector, FLUX, VAE, T5; their weights and sources."""

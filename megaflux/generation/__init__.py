"""Pictures from a reference and a prompt: requests, jobs, the pipeline, their inputs and outputs."""

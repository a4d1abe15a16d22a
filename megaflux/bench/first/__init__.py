"""make gpu-first: what ten minutes on one GPU can tell, the most valuable first.

A step is a process with a time limit; each fact is a line of OUT/facts.jsonl as soon as it is known. The first part needs
torch, triton, transformers and diffusers; the second, the training loop, also DeepSpeed, streaming and pydantic.

facts.py      a fact, and the file they are kept in
predicted.py  what was expected, from the audit and the papers
steps.py      the steps, in order; each of the modules below is one
runner.py     starts them, watches their time, starts again what died
results.py    OUT -> a section of docs/gpu-results.md
"""

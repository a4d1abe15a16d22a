"""make gpu-first: what can be learned in ten minutes on one GPU, the most valuable first.

A step is a process with a time limit; each fact is a line of OUT/facts.jsonl as soon as it is known. The first part needs
torch, triton, transformers and diffusers; the second, the training loop, also DeepSpeed, streaming and pydantic.

facts.py      a fact, and the file of facts
predicted.py  what was expected, from the audit and the papers
steps.py      the steps, in order; each is a module of this package
runner.py     starts them, watches their time, restarts those that die
results.py    OUT -> a section of docs/gpu-results.md
"""

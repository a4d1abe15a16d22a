"""Fault handling: signals, watchdog, guard, events, rendezvous."""

"""What keeps a run alive or ends it well: signals, watchdog, guard, events, rendezvous."""

"""ControlNets, and the detectors that make their maps."""

"""ControlNets and the detectors that draw their maps."""

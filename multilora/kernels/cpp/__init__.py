"""The small work between two matrix products of a step on a CPU, in C++ and a few calls a layer."""

"""C sources of the CPU kernels, what compiles them (build.py), and the library that an installation compiled."""

"""C sources of the CPU kernels, build.py that compiles them, and the library that an installation compiled."""

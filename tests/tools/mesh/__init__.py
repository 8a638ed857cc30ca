"""The parts of the mesh test: certificates, proxies, load. tests/tools/through_mesh.py puts them together."""

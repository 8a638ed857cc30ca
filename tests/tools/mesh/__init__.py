"""The parts of tests/tools/through_mesh.py: certificates, proxies, load."""

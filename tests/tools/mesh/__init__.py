"""The parts of tests/tools/through_mesh.py and tests/tools/watches_through_mesh.py."""

"""The intermediate representation: meshes, layouts, sharding rules, the mesh dialect, Programs.

This package is the leaf of the import order: it imports nothing else of rolemesh and holds no
process-group state.
"""

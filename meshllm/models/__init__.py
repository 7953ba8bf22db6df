"""Models: their names, the catalog, what is on disk, and how they come there.

`names` and `catalog` need no compiled code; `store`, which reads the files, does.
"""

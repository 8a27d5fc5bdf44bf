"""From files of text to global batches on the mesh."""

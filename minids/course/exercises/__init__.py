"""The exercises: one module per chapter, whose EXERCISES lists what its notebook in exercises/ asks for."""

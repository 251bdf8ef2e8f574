"""What holds for all tests."""

from hypothesis import settings

# A machine that does other work as well must not fail a law; and a run leaves nothing behind.
settings.register_profile("laws", deadline=None, database=None)
settings.load_profile("laws")

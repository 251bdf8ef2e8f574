"""Where a precision comes from other than passes over data, one file a source."""

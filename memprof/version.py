"""memprof's version, where everything can read it without loading anything."""

VERSION = "0.1.0"

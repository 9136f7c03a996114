"""Passes: FX graph in, FX graph out; one pass a file, and the analyses that they share."""

if __name__ != "cpcompile.passes":
    raise ImportError(f"{__name__} is not a package of its own: import cpcompile.passes")

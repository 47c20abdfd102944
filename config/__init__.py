# Makes this folder a package, so that `from config...` finds it before any other of that name.

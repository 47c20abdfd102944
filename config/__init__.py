# Makes this folder a package: else another one of that name, if installed, is what `from config...` would find.

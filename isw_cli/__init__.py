"""The command line, `isw`: what `isw_plugin` does, on a model by name and a folder of images.

A package of its own, since `isw_plugin` imports torch: `isw --help` must not.
"""

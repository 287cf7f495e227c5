"""Pictures of a plan and of the step that was measured: page, SVG, PNG, trace, sketch, graph.

`model` holds what is drawn as plain frozen data, `build` takes it from a plan, and every other
module turns it into one kind of file. `api` picks the module by the suffix of the file.
"""

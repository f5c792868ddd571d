"""A small procedural universe with exact ground truth: scenes, captions, motion and a renderer.

`sampling.sample` draws scenes, `grammar.captions` says them, `render.render` and `render.render_video` show them.
"""

# SPDX-License-Identifier: Apache-2.0
"""What compiled templates run on; imports nothing of jinja2.

The code object that `cuda_progcache.templates.compiler.Compiler.compile` gives is executed in a namespace of::

    _rt            this module, or cuda_progcache.templates.jinja_runtime: the same names over Jinja2's classes
    environment    the environment: filters, tests, undefined, finalize, get_template(name, parent), ...
    _pc_0, _pc_1   the values of Compiler.precomputed, if there are any
    __name__       any module name

and defines::

    name           the template's name, or None
    source         the text it was compiled from, or None; what the lazy forms are compiled from
    render(ctx, _blocks=None) -> str
    _block_NAME(ctx, _blocks) -> str       for each block and region
    blocks         {NAME: _block_NAME}
    regions        {NAME: ((parameter, ...), number of defaults)}
    _globals_setup(ctx)                    where the template has {% globals %} or {% imports %}

In an async environment ``render`` and the blocks are coroutine functions. Compiled for streaming (``form="stream"``)
the code defines ``render_stream(ctx, _blocks=None)`` and ``_block_NAME_stream`` in their place: generators, or async
generators, that put out runs of text; ``form="pieces"`` is the same with one item per piece of output, as Jinja2's own.

`ctx` has ``vars`` (what the template set), ``parent`` (what it was given), ``environment``, ``eval_ctx``, ``name``,
``blocks`` ({name: [Block, ...]}, the child's first), ``exported_vars``, ``escaped`` (whether foreign code has seen it), and
``call``, ``derived``, ``get_all``, ``resolve_or_missing``.
"""

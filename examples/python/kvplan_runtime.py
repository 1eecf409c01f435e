"""The C ABI of the CUDA runtime (kernels/runtime.h) for Python, with ctypes alone.

Device memory comes from the caller as addresses, for example torch's `tensor.data_ptr()`.
"""

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p

STATUSES = ("OK", "NO_DEVICE", "OLD_DEVICE", "BAD_ARGUMENT", "CUDA_ERROR", "BAD_PLAN",
            "OUT_OF_MEMORY", "OUT_OF_BLOCKS", "TOO_LONG", "INTERNAL")


class DeviceInfo(ctypes.Structure):
    _fields_ = [("name", c_char * 256), ("compute_capability", c_int), ("multiprocessors", c_int),
                ("memory_bytes", c_size_t), ("l2_bytes", c_size_t), ("driver_version", c_int)]


class Geometry(ctypes.Structure):
    _fields_ = [("query_heads", c_int), ("max_sequences", c_int), ("max_tokens", c_int64),
                ("blocks", c_int64), ("max_query_tokens", c_int), ("device", c_int)]


class Size(ctypes.Structure):
    _fields_ = [(name, c_size_t) for name in
                ("pages", "open", "tables", "statics", "workspace", "total", "block_bytes")]


class Shape(ctypes.Structure):
    _fields_ = [(name, c_int) for name in
                ("num_layers", "kv_heads", "query_heads", "head_dim", "sink_tokens", "page_tokens")]


class Attention(ctypes.Structure):
    _fields_ = [("scale", c_float), ("soft_cap", c_float), ("window", c_int64)]


_ARGUMENTS = {
    "query_device": [c_int, POINTER(DeviceInfo)],
    "size_of": [c_char_p, POINTER(Geometry), c_int, POINTER(Size)],
    "create": [c_char_p, POINTER(Geometry), POINTER(c_void_p)],
    "runtime_size": [c_void_p, POINTER(Size)],
    "runtime_shape": [c_void_p, POINTER(Shape)],
    "begin_step": [c_void_p, c_int, POINTER(c_int), POINTER(c_int), c_void_p],
    "append": [c_void_p, c_int, c_void_p, c_void_p, c_void_p],
    "attend": [c_void_p, c_int, c_void_p, POINTER(Attention), c_void_p, c_void_p, c_void_p],
    "read_back": [c_void_p, c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
    "copy_page": [c_void_p, c_int, c_int, c_int64, c_void_p, c_size_t, POINTER(c_size_t)],
    "length": [c_void_p, c_int, POINTER(c_int64)],
    "fork": [c_void_p, c_int, c_int, c_void_p],
    "release": [c_void_p, c_int],
    "free_blocks": [c_void_p, POINTER(c_int64)],
}


class Error(RuntimeError):
    """A call that failed: `status` is a name of STATUSES, the text the runtime's own sentence."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Library:
    """libkvplan_runtime.so; calls that fail raise Error."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(self._library, "kvplan_" + name)
            function.argtypes, function.restype = arguments, c_int
        self._library.kvplan_last_error.restype = c_char_p
        self._library.kvplan_destroy.argtypes = [c_void_p]
        self._library.kvplan_destroy.restype = None

    def call(self, name, *arguments):
        status = getattr(self._library, "kvplan_" + name)(*arguments)
        if status != 0:
            known = STATUSES[status] if status < len(STATUSES) else str(status)
            raise Error(known, self._library.kvplan_last_error().decode())

    def device(self, index=0):
        info = DeviceInfo()
        self.call("query_device", index, byref(info))
        return info

    def size_of(self, plan, geometry, multiprocessors=0):
        size = Size()
        self.call("size_of", str(plan).encode(), byref(geometry), multiprocessors, byref(size))
        return size

    def destroy(self, handle):
        self._library.kvplan_destroy(handle)


class Runtime:
    """A cache made from a plan; a context manager. Addresses are ints, `stream` a CUDA stream's."""

    def __init__(self, library, plan, geometry):
        self._library, self._handle = library, c_void_p()
        library.call("create", str(plan).encode(), byref(geometry), byref(self._handle))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._library.destroy(self._handle)
        self._handle = c_void_p()

    def _call(self, name, *arguments):
        self._library.call(name, self._handle, *arguments)

    def _ask(self, name, result, *arguments):
        self._call(name, *arguments, byref(result))
        return result

    def size(self):
        return self._ask("runtime_size", Size())

    def shape(self):
        return self._ask("runtime_shape", Shape())

    def length(self, slot):
        return self._ask("length", c_int64(), slot).value

    def free_blocks(self):
        return self._ask("free_blocks", c_int64()).value

    def begin_step(self, slots, tokens, stream=0):
        ints = c_int * len(slots)
        self._call("begin_step", len(slots), ints(*slots), ints(*tokens), stream)

    def append(self, layer, k, v, stream=0):
        self._call("append", layer, k, v, stream)

    def attend(self, layer, q, out, lse=None, scale=0.0, soft_cap=0.0, window=0, stream=0):
        options = Attention(scale, soft_cap, window)
        self._call("attend", layer, q, byref(options), out, lse, stream)

    def read_back(self, layer, slot, first, count, k, v, stream=0):
        self._call("read_back", layer, slot, first, count, k, v, stream)

    def copy_page(self, layer, slot, page):
        needed = c_size_t()
        self._call("copy_page", layer, slot, page, None, 0, byref(needed))
        bytes_ = ctypes.create_string_buffer(needed.value)
        self._call("copy_page", layer, slot, page, bytes_, needed.value, None)
        return bytes_.raw

    def fork(self, source, target, stream=0):
        self._call("fork", source, target, stream)

    def release(self, slot):
        self._call("release", slot)

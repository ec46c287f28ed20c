"""Speaks one sentence with the espeak-ng library; a program that runs in a separate process.

The library keeps state between sentences and seeds its breath noise with the time of day. A process per sentence with a
fixed seed makes the sound a pure function of the arguments, and keeps the GPL library out of this project's process.
Imports only the standard library.

Argument: a JSON object with library, data, voice, rate, pitch, range, text. Output: a line of JSON (sample rate, and
phonemes as [seconds, IPA symbol]), then 16-bit samples. Exit status 3: unknown voice.
"""

import ctypes
import json
import sys

PHONEME_EVENT = 7
SYNCHRONOUS = 2
OPTIONS = 0x8000 | 1 | 2  # do not exit on errors; phoneme events; as IPA
RATE, PITCH, RANGE = 1, 3, 4
UTF8 = 1
SEED = 1


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int)]
    _fields_ += [("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int)]
    _fields_ += [("user_data", ctypes.c_void_p), ("id", _Id)]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def main() -> int:
    """Speaks the request; returns the exit status."""
    request = json.loads(sys.argv[1])
    library = ctypes.CDLL(request["library"])
    data = request["data"].encode() if request["data"] else None
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, data, OPTIONS)
    if rate <= 0:
        print("the library cannot find its data", file=sys.stderr)
        return 1
    if hasattr(library, "espeak_ng_SetRandSeed"):  # since 1.52
        library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    ctypes.CDLL(None).srand(SEED)
    pieces, phonemes = [], []

    def receive(wave, count, events):
        if count > 0:
            pieces.append(ctypes.string_at(wave, 2 * count))
        i = 0
        while events[i].type:
            if events[i].type == PHONEME_EVENT:
                symbol = events[i].id.string.decode("utf-8", "ignore")
                phonemes.append([events[i].sample / rate, symbol])
            i += 1
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(request["voice"].encode()):
        print(f"no voice {request['voice']}", file=sys.stderr)
        return 3
    for parameter, value in ((RATE, request["rate"]), (PITCH, request["pitch"]), (RANGE, request["range"])):
        library.espeak_SetParameter(parameter, value, 0)
    text = request["text"].encode()
    library.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint]
    library.espeak_Synth.argtypes += [ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    if library.espeak_Synth(text, len(text) + 1, 0, 1, 0, UTF8, None, None):
        print("synthesis failed", file=sys.stderr)
        return 1
    library.espeak_Synchronize()
    sys.stdout.buffer.write(json.dumps({"rate": rate, "phonemes": phonemes}).encode() + b"\n" + b"".join(pieces))
    return 0


if __name__ == "__main__":
    sys.exit(main())

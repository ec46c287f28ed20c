"""Speech encoders: wav2vec 2.0 and Whisper."""

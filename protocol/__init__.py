"""The kernel: ids, time, dice, machines, wire codec, envelopes, messages, limits and errors. All pure."""

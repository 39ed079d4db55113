package cache

// HoldBackWhole is the size in bytes up to which a body is verified before
// its first byte is served.
const HoldBackWhole = 4 << 20

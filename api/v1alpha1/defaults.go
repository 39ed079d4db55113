package v1alpha1

// What holds where the spec says nothing.
const (
	DefaultSchedule    = "* * * * *"
	DefaultConcurrency = 6
	DefaultMaxRemovals = 50
	// DefaultChunkSizeInMb in MiB.
	DefaultChunkSizeInMb             = 16
	DefaultMessageTTL                = "P2D"
	DefaultNodeTimeout               = "PT15M"
	DefaultHold                      = "PT5M"
	DefaultGarbageCollectionSchedule = "0 3 * * *"
	DefaultGarbageCollectionMinAge   = "PT24H"
)

// SetDefaults writes the defaults into the fields that say nothing.
func (c *ConnectedRegistry) SetDefaults() {
	s := &c.Spec
	setDefault(&s.Mode, ModeReadOnly)
	setDefault(&s.LogLevel, LogLevelInformation)
	setDefault(&s.Sync.Schedule, DefaultSchedule)
	setDefault(&s.Sync.Concurrency, DefaultConcurrency)
	setDefault(&s.Sync.MaxRemovals, DefaultMaxRemovals)
	setDefault(&s.Sync.ChunkSizeInMb, DefaultChunkSizeInMb)
	setDefault(&s.Sync.MessageTTL, DefaultMessageTTL)
	setDefault(&s.TLS.Source, TLSSourceBuiltIn)
	setDefault(&s.TrustDistribution.NodeTimeout, DefaultNodeTimeout)
	setDefault(&s.TrustDistribution.Hold, DefaultHold)
	setDefault(&s.GarbageCollection.Schedule, DefaultGarbageCollectionSchedule)
	setDefault(&s.GarbageCollection.MinAge, DefaultGarbageCollectionMinAge)
	for _, on := range []**bool{&s.Sync.Referrers, &s.Sync.OnDemand, &s.TrustDistribution.SystemTrust, &s.GarbageCollection.Enabled} {
		if *on == nil {
			*on = new(true)
		}
	}
	for i := range s.Mirrors {
		s.Mirrors[i].setDefaults()
	}
}

func (m *Mirror) setDefaults() {
	for _, on := range []**bool{&m.ResolveTags, &m.Fallback} {
		if *on == nil {
			*on = new(true)
		}
	}
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

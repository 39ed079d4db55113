package v1alpha1

// What holds where the spec says nothing.
const (
	DefaultSchedule    = "* * * * *"
	DefaultConcurrency = 6
	DefaultMaxRemovals = 50
)

// SetDefaults writes the defaults into the fields that say nothing.
func (c *ConnectedRegistry) SetDefaults() {
	s := &c.Spec
	setDefault(&s.Mode, ModeReadOnly)
	setDefault(&s.LogLevel, LogLevelInformation)
	setDefault(&s.Sync.Schedule, DefaultSchedule)
	setDefault(&s.Sync.Concurrency, DefaultConcurrency)
	setDefault(&s.Sync.MaxRemovals, DefaultMaxRemovals)
	if s.Sync.Referrers == nil {
		s.Sync.Referrers = new(true)
	}
	for i := range s.Mirrors {
		m := &s.Mirrors[i]
		if m.ResolveTags == nil {
			m.ResolveTags = new(true)
		}
		if m.Fallback == nil {
			m.Fallback = new(true)
		}
	}
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

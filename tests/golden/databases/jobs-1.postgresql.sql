CREATE TABLE public.adapter_foundry_job_pictures (
    job text NOT NULL,
    place integer NOT NULL,
    data bytea NOT NULL
);
CREATE TABLE public.adapter_foundry_jobs (
    id text NOT NULL,
    caller text NOT NULL,
    state text NOT NULL,
    request text NOT NULL,
    fingerprint text NOT NULL,
    idempotency text,
    owner text,
    error text,
    results text,
    webhook text,
    rows integer NOT NULL,
    step integer NOT NULL,
    steps integer NOT NULL,
    attempts integer NOT NULL,
    size integer NOT NULL,
    not_before double precision NOT NULL,
    created double precision NOT NULL,
    lease double precision,
    started double precision,
    ended double precision
);
CREATE TABLE public.adapter_foundry_webhooks (
    id text NOT NULL,
    job text NOT NULL,
    caller text NOT NULL,
    url text NOT NULL,
    body text NOT NULL,
    attempts integer NOT NULL,
    next double precision NOT NULL,
    done double precision
);
INSERT INTO public.adapter_foundry_job_pictures VALUES ('job-two', -1, '\x612070696374757265');
INSERT INTO public.adapter_foundry_job_pictures VALUES ('job-three', -1, '\x612070696374757265');
INSERT INTO public.adapter_foundry_job_pictures VALUES ('job-one', 0, '\x6120726573756c74');
INSERT INTO public.adapter_foundry_jobs VALUES ('job-two', 'kim', 'queued', '{"rows": 1}', 'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', 'key-1', NULL, NULL, NULL, NULL, 1, 0, 4, 0, 9, 1760000001, 1760000001, NULL, NULL, NULL);
INSERT INTO public.adapter_foundry_jobs VALUES ('job-three', 'kim', 'queued', '{"rows": 1}', 'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', 'key-2', NULL, NULL, NULL, NULL, 1, 0, 4, 0, 9, 1760000002, 1760000002, NULL, NULL, NULL);
INSERT INTO public.adapter_foundry_jobs VALUES ('job-one', 'kim', 'succeeded', '{"rows": 1}', 'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', 'key-0', NULL, NULL, '[{"steps": 4}]', 'https://example.org/hook', 1, 4, 4, 1, 8, 1760000000, 1760000000, NULL, 1760000000, 1760000000);
INSERT INTO public.adapter_foundry_webhooks VALUES ('msg_v_wilKQLnojJTXOZEZGtfg', 'job-one', 'kim', 'https://example.org/hook', '{"type": "job.succeeded", "timestamp": "2025-10-09T08:53:20.000+00:00", "data": {"id": "job-one", "status": "succeeded", "created": "2025-10-09T08:53:20.000+00:00", "started": "2025-10-09T08:53:20.000+00:00", "ended": "2025-10-09T08:53:20.000+00:00", "rows": 1, "step": 4, "steps": 4, "results": [{"image": "/v1/jobs/job-one/results/0.png", "steps": 4}], "error": null}}', 0, 1760000000, NULL);
ALTER TABLE ONLY public.adapter_foundry_job_pictures
    ADD CONSTRAINT adapter_foundry_job_pictures_pkey PRIMARY KEY (job, place);
ALTER TABLE ONLY public.adapter_foundry_jobs
    ADD CONSTRAINT adapter_foundry_jobs_caller_idempotency_key UNIQUE (caller, idempotency);
ALTER TABLE ONLY public.adapter_foundry_jobs
    ADD CONSTRAINT adapter_foundry_jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.adapter_foundry_webhooks
    ADD CONSTRAINT adapter_foundry_webhooks_pkey PRIMARY KEY (id);
CREATE INDEX adapter_foundry_jobs_state ON public.adapter_foundry_jobs USING btree (state, created);

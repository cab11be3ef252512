BEGIN TRANSACTION;
CREATE TABLE adapter_foundry_job_pictures (
	job TEXT NOT NULL, 
	place INTEGER NOT NULL, 
	data BLOB NOT NULL, 
	PRIMARY KEY (job, place)
);
INSERT INTO "adapter_foundry_job_pictures" VALUES('job-two',-1,X'612070696374757265');
INSERT INTO "adapter_foundry_job_pictures" VALUES('job-three',-1,X'612070696374757265');
INSERT INTO "adapter_foundry_job_pictures" VALUES('job-one',0,X'6120726573756C74');
CREATE TABLE adapter_foundry_jobs (
	id TEXT NOT NULL, 
	caller TEXT NOT NULL, 
	state TEXT NOT NULL, 
	request TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	idempotency TEXT, 
	owner TEXT, 
	error TEXT, 
	results TEXT, 
	webhook TEXT, 
	rows INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	steps INTEGER NOT NULL, 
	attempts INTEGER NOT NULL, 
	size INTEGER NOT NULL, 
	not_before DOUBLE NOT NULL, 
	created DOUBLE NOT NULL, 
	lease DOUBLE, 
	started DOUBLE, 
	ended DOUBLE, 
	PRIMARY KEY (id), 
	UNIQUE (caller, idempotency)
);
INSERT INTO "adapter_foundry_jobs" VALUES('job-one','kim','succeeded','{"rows": 1}','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','key-0',NULL,NULL,'[{"steps": 4}]','https://example.org/hook',1,4,4,1,8,1760000000.0,1760000000.0,NULL,1760000000.0,1760000000.0);
INSERT INTO "adapter_foundry_jobs" VALUES('job-two','kim','queued','{"rows": 1}','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','key-1',NULL,NULL,NULL,NULL,1,0,4,0,9,1760000001.0,1760000001.0,NULL,NULL,NULL);
INSERT INTO "adapter_foundry_jobs" VALUES('job-three','kim','queued','{"rows": 1}','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','key-2',NULL,NULL,NULL,NULL,1,0,4,0,9,1760000002.0,1760000002.0,NULL,NULL,NULL);
CREATE TABLE adapter_foundry_webhooks (
	id TEXT NOT NULL, 
	job TEXT NOT NULL, 
	caller TEXT NOT NULL, 
	url TEXT NOT NULL, 
	body TEXT NOT NULL, 
	attempts INTEGER NOT NULL, 
	next DOUBLE NOT NULL, 
	done DOUBLE, 
	PRIMARY KEY (id)
);
INSERT INTO "adapter_foundry_webhooks" VALUES('msg_wKzk7waB1_B0zyis-_RWIw','job-one','kim','https://example.org/hook','{"type": "job.succeeded", "timestamp": "2025-10-09T08:53:20.000+00:00", "data": {"id": "job-one", "status": "succeeded", "created": "2025-10-09T08:53:20.000+00:00", "started": "2025-10-09T08:53:20.000+00:00", "ended": "2025-10-09T08:53:20.000+00:00", "rows": 1, "step": 4, "steps": 4, "results": [{"image": "/v1/jobs/job-one/results/0.png", "steps": 4}], "error": null}}',0,1760000000.0,NULL);
CREATE INDEX adapter_foundry_jobs_state ON adapter_foundry_jobs (state, created);
COMMIT;
